"""`python -m twostroke.bench.gpu`."""

from twostroke.bench.gpu.main import main

if __name__ == "__main__":
    main()
