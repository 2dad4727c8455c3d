"""What makes the clips of a batch in a child or an actor. Only this room loads PyTorch."""
