"""Memory plan: bytes per rank of a model at each ZeRO stage and offload, and choices that fit."""
