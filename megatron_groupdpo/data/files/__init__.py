"""Files of every readable kind to raw records."""
