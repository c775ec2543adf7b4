"""Tables, figures and a page from records.

In: records, sweep layouts, published numbers. Out: Markdown, CSV, LaTeX, SVG, PNG, HTML. Runs no model.
"""
