"""`python -m ragtune_ray.cli`, the same as `ragtune`."""

from ragtune_ray.cli.command import main

if __name__ == "__main__":
    main()
