"""The site of the documentation: pip install '.[docs]' && sphinx-build -W docs site."""

project, author, copyright = "crystalframer_jax", "The crystalframer_jax developers", "MIT license"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
html_theme, html_title, html_show_sphinx = "furo", "crystalframer_jax", False
html_copy_source = html_show_sourcelink = False
nb_execution_mode, nb_merge_streams = "off", True  # notebooks are kept with their output
myst_enable_extensions = ["attrs_block", "colon_fence", "dollarmath"]
myst_heading_anchors = 4
autodoc_typehints, autodoc_member_order, autodoc_preserve_defaults = "signature", "bysource", True
autodoc_default_options = {"members": True}
napoleon_use_ivar = True
