"""The demo: AdamW replaced in one line, then three levels, on scikit-learn's digits as a stream."""
