"""From the body of a request to a job, by the rules of the API, the model and the server."""
