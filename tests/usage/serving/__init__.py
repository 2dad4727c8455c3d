"""Using the service as people and machines do: faults at any moment, and many clients at once."""
