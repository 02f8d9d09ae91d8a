"""The report of a run: one HTML file without scripts that shows what was trained, how it went and what came out."""
