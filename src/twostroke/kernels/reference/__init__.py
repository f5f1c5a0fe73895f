"""The reference backend: plain NumPy, the measure for every other backend."""
