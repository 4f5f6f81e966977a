def search_scales(flat, absmax, config):
    return absmax
