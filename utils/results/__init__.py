"""Results out: folder names, what is known of a result, load_distilled, export formats, report, figures."""
