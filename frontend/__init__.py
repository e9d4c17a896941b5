"""From a checkpoint directory or a module to a traced IR module."""
