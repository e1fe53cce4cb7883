"""What a cache does to a model: calls of attention captured, run through a simulated cache, and scored."""
