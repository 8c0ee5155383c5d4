"""Layout and mask become tiles, tiles one forward and one backward loop. Never imports nnScaler."""
