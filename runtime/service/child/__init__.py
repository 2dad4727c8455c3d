"""The process that makes clips, and what it and the supervisor tell each other. Only this room loads PyTorch."""
