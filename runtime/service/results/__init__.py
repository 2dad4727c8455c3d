"""The object storage: what clients upload and what jobs make, in a folder or in S3."""
