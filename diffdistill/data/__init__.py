"""What a training reads: images, prompts, latents, noise-image pairs."""
