"""Program + plan -> the fx GraphModule of each stage. Imports torch."""
