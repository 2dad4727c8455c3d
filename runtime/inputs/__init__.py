"""What users hand over: prompts, files of prompts, pictures and noise."""
