"""What a request costs a GPU at least, counted launch by launch, and what memory it takes."""
