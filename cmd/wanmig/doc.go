// Wanmig moves running virtual machines between sites.
//
// The command asks the agent of its host over a unix socket and shows what the
// agent answers; the agent does the work. A file here is a subcommand, except
// follow.go (watching a move), bars.go and lines.go (its progress on a
// terminal and elsewhere), summary.go (how it ended), redirect_status.go (how a
// redirect stands), request.go (flags with values of their own) and format.go.
package main
