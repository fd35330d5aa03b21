"""The memories of the Neural Turing Machine and the Differentiable Neural Computer for altx."""
