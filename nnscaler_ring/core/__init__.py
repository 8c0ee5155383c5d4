"""The engine: layout + mask -> tiles -> one forward and one backward loop. Never imports nnScaler."""
