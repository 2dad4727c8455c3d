"""The HTTP side of the service: requests are checked and become jobs, and jobs are told about."""
