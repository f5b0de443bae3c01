"""The model and what samples from it: LoRA, log-probabilities, hidden states, the samplers."""
