"""The least time that a request takes on a GPU, counted launch by launch, and the memory it needs."""
