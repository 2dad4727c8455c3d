"""From latents to the pictures of a clip or a stream."""
