package main

import (
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/wanmig/wanmig/lab"
)

func vmCommand(dir *string) *cobra.Command {
	var o lab.VMOptions
	var disks []string
	var format, memory, dirty, edit, write, workingSet string
	var persistent bool
	cmd := &cobra.Command{
		Use:   "vm NAME",
		Short: "Boot a guest with files on its disks and a load to verify",
		Long: `vm makes a guest from Debian's packages and waits until it answers. Its first
disk holds files from this machine's packages, up to a third of its size.

With --image debian the first disk, of 3 GiB, holds Debian 12 with systemd, nginx
at port 8080 and PostgreSQL at port 5432, which has a database named bench and
asks no password of its user postgres. Root needs none on the serial console.
The lab's own program is a service of it. See wanlab image.

A disk is a size or the path of an empty block device, and may say
format=raw|qcow2, bus=virtio|scsi|sata and backing=yes|no:
  --disk 1GiB --disk 512MiB,format=qcow2,bus=scsi --disk /dev/loop3

With --second-nic it is also in the network of its data centre's br1, at an
address that ends like its first one. Users have a route there, and it answers
by the NIC whose address was asked.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.Name = args[0]
			o.Progress = func(line string) { fmt.Fprintln(cmd.ErrOrStderr(), line) }
			if o.Image != "" && !cmd.Flags().Changed("disk") {
				disks = []string{"3GiB"}
			}
			for _, s := range disks {
				d, err := lab.ParseDisk(s, format)
				if err != nil {
					return err
				}
				o.Disks = append(o.Disks, d)
			}
			for _, size := range []struct {
				flag, text string
				to         *int64
			}{{"memory", memory, &o.Memory}, {"dirty", dirty, &o.Dirty}, {"edit", edit, &o.Edit}, {"write", write, &o.Write}, {"working-set", workingSet, &o.WorkingSet}} {
				n, err := parseAmount(size.flag, size.text)
				if err != nil {
					return err
				}
				*size.to = n
			}
			l, err := lab.Open(*dir)
			if err != nil {
				return err
			}
			vm, err := l.CreateVM(cmd.Context(), o)
			if err != nil {
				return err
			}
			printVM(cmd.OutOrStdout(), vm)
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.Site, "site", lab.LocalDC, "data centre to boot it at")
	f.StringVar(&o.Image, "image", "", "system on its first disk: debian or debian-second (default: none, only the lab's program)")
	f.StringVar(&memory, "memory", "0", "memory (default 512MiB, with a system 1GiB)")
	f.IntVar(&o.VCPUs, "vcpus", 1, "virtual processors")
	f.StringArrayVar(&disks, "disk", []string{"1GiB"}, "a disk; can be given several times (with a system 3GiB)")
	f.StringVar(&format, "format", "raw", "format of disks that do not say: raw or qcow2")
	f.StringVar(&dirty, "dirty", "0", "memory to dirty, such as 20MiB/s")
	f.StringVar(&edit, "edit", "0", "memory to change in a few words a page, such as 20MiB/s")
	f.StringVar(&write, "write", "0", "blocks to write to each disk, such as 5MiB/s")
	f.StringVar(&workingSet, "working-set", "0", "memory to dirty in (default 64MiB, with a system 8MiB)")
	f.BoolVar(&o.Transient, "transient", false, "make a domain that is gone when it stops")
	f.BoolVar(&persistent, "persistent", true, "make a domain that stays defined when it stops")
	f.StringVar(&o.Accel, "accel", "auto", "kvm, tcg, or auto: kvm where a guest boots with it")
	f.BoolVar(&o.UEFI, "uefi", false, "boot with OVMF and an NVRAM of its own")
	f.BoolVar(&o.CDROM, "cdrom", false, "attach a read-only CD-ROM")
	f.BoolVar(&o.SSH, "ssh", false, "run an ssh server, for wanlab client --ssh")
	f.BoolVar(&o.GuestAgent, "guest-agent", false, "run qemu-guest-agent, for virsh domifaddr --source agent")
	f.BoolVar(&o.SecondNIC, "second-nic", false, "attach a second NIC, to br1")
	addImages(cmd, &o.Cache, &o.Guest)
	cmd.MarkFlagsMutuallyExclusive("transient", "persistent")
	return cmd
}

func printVM(w io.Writer, vm *lab.VM) {
	fmt.Fprintf(w, "%s is up at %s after %.1f s (%s)\n  %s, %s%%br0, %s\n",
		vm.Name, vm.Home, vm.BootTime.Seconds(), vm.Accel, vm.Address, vm.LinkLocal, vm.MAC)
	if vm.Second != nil {
		fmt.Fprintf(w, "  %s, %s, %s\n", vm.Second.Address, vm.Second.Address6, vm.Second.MAC)
	}
	fmt.Fprintf(w, "  disks %s\n  console log %s\n", strings.Join(vm.Disks, ", "), vm.SerialLog())
}

// parseAmount reads a size, or a rate per second.
func parseAmount(flag, text string) (int64, error) {
	if text == "0" {
		return 0, nil
	}
	n, err := lab.ParseSize(strings.TrimSuffix(text, "/s"))
	if err != nil {
		return 0, fmt.Errorf("--%s: %w", flag, err)
	}
	return n, nil
}

// findVM opens a VM, and finds the data centre where it runs unless site names it.
func findVM(cmd *cobra.Command, dir, name, site string) (*lab.VM, string, error) {
	l, err := lab.Open(dir)
	if err != nil {
		return nil, "", err
	}
	vm, err := l.VM(name)
	if err != nil {
		return nil, "", err
	}
	if site == "" {
		site, err = vm.Site(cmd.Context())
	}
	return vm, site, err
}
