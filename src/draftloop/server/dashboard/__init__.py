"""The dashboard at `/`: one page without a build step, and the JSON that it polls."""
