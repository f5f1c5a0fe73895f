"""`python -m twostroke.bench`."""

from twostroke.bench.main import main

if __name__ == "__main__":
    main()
