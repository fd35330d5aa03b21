"""The ops of this plugin, one package each."""
