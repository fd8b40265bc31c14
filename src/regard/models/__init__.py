"""Small reference models with a pluggable attention layer."""
