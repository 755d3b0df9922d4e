"""The methods: modules that own adapter parameters and call ops. One file each, one entry in `fastpeft.mapping`."""
