"""What the network sees, and when.

The Fourier crop, EfficientTrain's schedules as a callback, and the search for a schedule will live here.
"""
