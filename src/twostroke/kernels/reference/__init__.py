"""The reference backend: plain NumPy that reads like the papers; every other backend is checked against it."""
