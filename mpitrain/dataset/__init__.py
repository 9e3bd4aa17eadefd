"""From text to what a rank sees at step s."""
