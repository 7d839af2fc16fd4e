"""From logits to text: caches, sampling, the decoding loop, speculative decoding, Harmony."""
