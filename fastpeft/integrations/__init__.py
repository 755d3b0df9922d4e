"""What connects fastpeft to other libraries; each module is imported only when it is asked for."""
