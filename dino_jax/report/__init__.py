"""A page that shows a run: verdict, curves, and what the network sees and finds alike."""
