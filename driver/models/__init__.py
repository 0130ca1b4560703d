"""Reference programs in plain JAX, small and at full size: GPT, a mixture of experts, a wide ResNet."""
