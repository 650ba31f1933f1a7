"""Files from elsewhere: downloads, archives read as streams, pickles that run nothing."""
