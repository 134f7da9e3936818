"""How sure the network is.

GP-matched functional priors with their posterior, and deep kernel machines as a head on any backbone, will live here.
"""
