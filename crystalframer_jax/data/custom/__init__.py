"""Users' own crystals: folders, tables, JSON, extended XYZ, pickles."""
