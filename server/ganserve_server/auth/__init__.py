"""Who may call: TLS certificates, bearer tokens and their rates.

Knows neither models nor services. Of the transport it may import the interface; the transport may not import it.
"""
