"""The whole story on a made-up language pair, in minutes on a laptop."""
