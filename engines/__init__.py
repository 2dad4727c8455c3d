"""What is on disk between building and running: tensor files, bundles and what they were made from."""
