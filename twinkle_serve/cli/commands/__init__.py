"""The commands of `twinkle-serve`, a module each."""
