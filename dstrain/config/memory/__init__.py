"""Memory plan: bytes per rank of a model at every ZeRO stage and offload, and what fits."""
