"""The machines that share a job store, and what each of them tells the others of its workers."""
