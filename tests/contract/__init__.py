"""The contract of `metateleport.LearnedOptimizer`: in a training loop it behaves as torch's own optimizers do."""
