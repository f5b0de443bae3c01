"""Data files: fetching, loading, manifests, and test assertions taken apart."""
