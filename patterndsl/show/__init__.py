"""Pictures of patterns: in the terminal, as PNG and SVG, and as a page to zoom into."""
